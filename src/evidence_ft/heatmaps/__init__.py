"""Heatmaps: each file exports ``heatmap(trace, score, *, create_graph)``, ``(B, h, w)``, non-negative."""
