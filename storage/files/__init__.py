"""Files and object stores: paths, durable writes, unit files with checksums, commits."""
