"""Effects, one library each: the only place that imports it, and that translates its errors."""
