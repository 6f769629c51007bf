"""Figures of a probe: layers by noise level, along depth, between noise levels, teacher and student, over training."""
