"""Traffic for a server: a workload of many adapters, sent to anything that speaks OpenAI's API, and measured.

arrivals = plan(Workload(models=("legal", "terse"), popularity=Popularity.ZIPF, num_requests=200, rate_per_s=20))
answers = asyncio.run(drive(Target("http://127.0.0.1:8000"), arrivals))
print(summarise(answers).text())
"""

from __future__ import annotations

from roadie.traffic.client import Answer, Target, drive, models_of
from roadie.traffic.summary import Distribution, Summary, summarise
from roadie.traffic.workload import Arrival, Popularity, Workload, plan

__all__ = [
    "Answer",
    "Arrival",
    "Distribution",
    "Popularity",
    "Summary",
    "Target",
    "Workload",
    "drive",
    "models_of",
    "plan",
    "summarise",
]
