"""Documents, and the token blocks cut from them."""
