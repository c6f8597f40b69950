"""The paper's study: cells, cost, ledger, workers, statistics, report."""
