"""CircuitsVis' token views, plotly figures and self-contained pages: reads results, computes nothing."""

from bilens.viz.circuits import AttentionPatterns, ColoredTokens, ColoredTokensMulti
from bilens.viz.page import Page

__all__ = ["AttentionPatterns", "ColoredTokens", "ColoredTokensMulti", "Page"]
