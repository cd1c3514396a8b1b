"""Folders of photos: found, read, labelled, compared with an earlier run."""
