"""The parts of readers: from a path to files, from bytes to lines, from JSON lines and Arrow batches to rows."""
