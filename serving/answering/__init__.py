"""What the routes do, without the web framework: collections, decisions, enrolment, subjects, jobs."""
