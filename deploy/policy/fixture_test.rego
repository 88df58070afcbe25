# A request that nothing stands against: deploy-bot, sponsored by sam, wants to read staging for maria.
package ringfence.fixture

good := {
	"now_s": 1000,
	"request": {
		"id": "5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d",
		"agent_id": "deploy-bot",
		"task_id": "c1a5e6f0-1b2c-5d3e-8f40-e6f01b2c5d3e",
		"scope": [{"target": "platform", "verbs": ["read"], "resources": ["env/staging/web"]}],
		"ttl_s": 300,
		"delivery": "agent",
		"reason": "look at what is deployed",
		"requested_at_s": 1000,
	},
	"agent": {"agent_id": "deploy-bot", "sponsor": "sam", "status": "active", "registered_at_s": 500},
	"sponsor": {"user_id": "sam", "status": "active", "roles": ["sponsor"]},
	"task": {
		"task_id": "c1a5e6f0-1b2c-5d3e-8f40-e6f01b2c5d3e",
		"agent_id": "deploy-bot",
		"on_behalf_of": "maria",
		"status": "active",
		"not_after": 9000,
	},
	"user": {"user_id": "maria", "status": "active", "roles": []},
	"target": {
		"target_id": "platform",
		"status": "active",
		"max_ttl_s": 3600,
		"revocability": "instant",
		"enforced_by": "target",
	},
	"floors": [],
	"lacking": [],
	"approvals": [],
	"held": [],
	"history": {"since_s": 0, "used": {}, "never_used": {"platform": ["read"]}, "granted": 1, "unused": 1},
}

# An action that nothing stands against: deploy-bot uses what it was given.
action := object.union(object.remove(good, ["request", "floors", "approvals", "held", "history"]), {
	"action": {"id": "a-1", "target_id": "platform", "verb": "read", "resource": "env/staging/web", "reads": true},
	"earlier": {"since_s": 900, "allowed": {"platform": {"read": 3}}, "denied": 1, "last_minute": 2},
	"lease": {
		"lease_id": "d6f0e3b4-9c1d-5a37-b0f2-e3b49c1d5a37",
		"agent_id": "deploy-bot",
		"task_id": "c1a5e6f0-1b2c-5d3e-8f40-e6f01b2c5d3e",
		"status": "active",
		"deadline": 1300,
	},
})

# The good request with one value replaced, or one removed; `path` as in JSON Pointer (RFC 6901).
with_value(path, value) := json.patch(good, [{"op": "replace", "path": path, "value": value}])

without(path) := json.remove(good, [path])

# The good request for other verbs on other resources.
wanting(verbs, resources) := with_value(
	"/request/scope",
	[{"target": "platform", "verbs": verbs, "resources": resources}],
)

# What is held already: each of these verbs, on everything at a target, by the lease `1`.
holding(given, target, verbs) := json.patch(given, [{
	"op": "add",
	"path": "/held",
	"value": [{"lease_id": "1", "scope": [{"target": target, "verbs": verbs, "resources": ["**"]}]}],
}])

codes(denials) := {denial.code | some denial in denials}
