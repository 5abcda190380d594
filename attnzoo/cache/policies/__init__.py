"""What the KV heads of a layer remember: policies, which hold no tensor of any sequence. One file for each method."""
