"""The process that stands in for an NDIF server. Started by `tests.nnsight_server.serve`, never imported there."""
