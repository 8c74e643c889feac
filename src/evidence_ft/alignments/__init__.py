"""Evidence losses: each file exports ``loss(heatmaps, masks)``, ``(B,)`` with NaN where nothing is annotated."""
