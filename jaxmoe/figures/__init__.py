"""Figures as data, their files, and the HTML page that shows them; nothing here knows a model or a capture."""
