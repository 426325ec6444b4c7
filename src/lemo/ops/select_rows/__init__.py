"""From scores of blocks to the rows that run, without asking the device."""
