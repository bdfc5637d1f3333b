"""Engines: who runs a study's stages, and where."""
