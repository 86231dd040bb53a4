"""What readers are made of: from a path to files, from bytes to lines, from JSON lines and Arrow batches to rows."""
