"""Studies: many methods, settings and seeds compared, in one design, by one rule."""
