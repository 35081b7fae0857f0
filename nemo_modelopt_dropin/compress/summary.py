def finish(records, root, title, job, scratch=False):
    for k,r in records.items(): print(k, r.seconds, r.result.get("heldout_loss"), r.result.get("parameters"), r.result.get("body_parameters"))
    return 0
