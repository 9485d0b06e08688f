"""Engines: what holds a candidate's weights and answers requests with them."""
