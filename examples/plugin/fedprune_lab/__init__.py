"""A laboratory's own parts for fedjaxprune."""
