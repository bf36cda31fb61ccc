"""The demonstration in a browser: a chat that shows which visual tokens are frozen, which are taken out, and what that saves."""
