"""Ray: a dump by actors that come and go (`potstill dump --ray`)."""
