"""Many runs side by side: read, compared, and shown as page, table and text."""
