"""Five jobs of attnzoo's users: lines and seconds, beside other packages that can do them."""
