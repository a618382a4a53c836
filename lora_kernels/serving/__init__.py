"""Serving many adapters."""
