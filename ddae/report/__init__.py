"""Figures of a run, and the HTML page that shows them."""
