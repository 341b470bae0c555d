"""The processes of a run: how they are launched and meet, their host and CPU, logging, small files, signals,
and what is known when one fails."""
