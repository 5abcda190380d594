"""Low-rank conversion: statistics of a text, groups of KV heads, closed forms, and refitting site by site."""
