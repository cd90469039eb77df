"""The configuration tree; installed as ``automodel.conf``."""
