"""What every stage shares and no stage owns: errors, configuration files, progress, logging.

Needs the standard library, pydantic, PyYAML and rich (on a terminal only); imports no other room.
"""
