"""A store held against its teacher: rows of it run again through an engine, and compared with what is stored."""
