"""Figures of the papers, made again on this machine: `bilens reproduce`."""
