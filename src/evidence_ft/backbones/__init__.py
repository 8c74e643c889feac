"""Backbones: each file exports ``load(checkpoint)``, a `DualEncoder`. The only modules that know model libraries."""
