"""What was measured: records, time, memory and arithmetic."""
