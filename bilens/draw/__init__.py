"""CircuitsVis' token views, plotly figures and self-contained pages: reads results, computes nothing."""

from bilens.draw.circuits import AttentionPatterns, ColoredTokens, ColoredTokensMulti
from bilens.draw.page import Page

__all__ = ["AttentionPatterns", "ColoredTokens", "ColoredTokensMulti", "Page"]
