"""Labelled images: published sets, folders and zips, and the batches made of them."""
