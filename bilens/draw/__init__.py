"""CircuitsVis' token views, plotly figures and self-contained pages: reads results, computes nothing."""

from bilens.draw.circuits import AttentionPatterns, ColoredTokens, ColoredTokensMulti
from bilens.draw.page import Page
from bilens.draw.plots import bars, heatmap, histogram, line, scatter, spectrum

__all__ = [
    "AttentionPatterns",
    "ColoredTokens",
    "ColoredTokensMulti",
    "Page",
    "bars",
    "heatmap",
    "histogram",
    "line",
    "scatter",
    "spectrum",
]
