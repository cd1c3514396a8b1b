"""What lies in a folder of photos: found, read, labelled, compared with before."""
