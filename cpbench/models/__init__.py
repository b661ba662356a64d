"""Decoder models: configurations, presets and the layers that run them."""
