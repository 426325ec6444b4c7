"""Language-model head and cross-entropy in segments of rows."""
