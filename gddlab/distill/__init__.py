"""Distillation: configuration, presets, student, discriminator, trainer."""
