"""ShortV models behind servers."""
