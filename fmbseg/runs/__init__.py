"""The same steps over whole collections: disk, resume, processes, records and tables."""
