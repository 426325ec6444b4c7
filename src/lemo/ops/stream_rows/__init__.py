"""The residual stream written in place: values of rows that ran a layer, bypass of rows that skipped it."""
