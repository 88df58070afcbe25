-- Asks Ringfence about a request:  http-request lua.ringfence URL HOST TIMEOUT
--
-- URL      where the gateway answers proxies, with the target's id
-- HOST     the name by which agents know the target: not what they say, as their proofs must be for it
-- TIMEOUT  how long the decision may take, in seconds: 15s
--
-- 200 sets txn.ringfence_allowed to "yes", and what is injected. 401 and 403 are the agent's answer; all else is 500.

local SHOWN = { "authorization", "dpop", "x-ringfence-label", "x-ringfence-handle" }
local TOLD = { "content-type", "www-authenticate", "dpop-nonce", "retry-after", "cache-control" }

-- The values of a header in their order; HAProxy counts them from 0.
local function values(headers, name)
    local found, at = {}, 0
    while headers[name] and headers[name][at] do
        found[#found + 1] = headers[name][at]
        at = at + 1
    end
    return found
end

local function refuse(txn, status, headers, body)
    local reply = txn:reply({ status = status, body = body })
    for _, name in ipairs(TOLD) do
        for _, value in ipairs(values(headers, name)) do
            reply:add_header(name, value)
        end
    end
    txn:done(reply)
end

core.register_action("ringfence", { "http-req" }, function(txn, url, host, timeout)
    local given = txn.http:req_get_headers()
    -- These headers and no others: none of the agent's X-Forwarded-* gets there. What comes twice is told twice.
    local question = {
        ["x-forwarded-method"] = { txn.f:method() },
        ["x-forwarded-uri"] = { txn.f:pathq() }, -- as it was sent
        ["x-forwarded-host"] = { host },
        ["x-forwarded-proto"] = { "https" },
    }
    for _, name in ipairs(SHOWN) do
        local shown = values(given, name)
        if #shown > 0 then
            question[name] = shown
        end
    end
    local answer = core.httpclient():get({
        url = url,
        headers = question,
        timeout = tonumber((timeout:gsub("s$", ""))) * 1000,
    })
    local status = answer and answer.status or 0
    local headers = answer and answer.headers or {}
    if status == 401 or status == 403 then
        return refuse(txn, status, headers, answer.body)
    end
    local authorization = values(headers, "authorization")[1]
    if status ~= 200 or not authorization then
        return refuse(txn, 500, {}, "")
    end
    txn:set_var("txn.ringfence_authorization", authorization)
    local key = values(headers, "x-api-key")[1]
    if key then
        txn:set_var("txn.ringfence_x_api_key", key)
    end
    txn:set_var("txn.ringfence_allowed", "yes")
end, 3)
