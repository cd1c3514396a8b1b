"""What teaches a guided generator: objectives over features of several guides, by config."""
