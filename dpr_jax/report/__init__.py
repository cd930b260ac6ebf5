"""The report: a page, its plots and token heatmaps, made from the files of a workdir."""

from dpr_jax.report.gaming import gaming
from dpr_jax.report.heatmap import write_heatmap
from dpr_jax.report.page import write_report

__all__ = ["gaming", "write_heatmap", "write_report"]
