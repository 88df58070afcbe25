// An agent with the official TypeScript SDK, which takes the same as client.py.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, mode, steps] = process.argv.slice(2);
const require = createRequire(`${process.env.MCP_SDKS}/`);
const { Client, StreamableHTTPClientTransport } = await import(
  pathToFileURL(require.resolve("@modelcontextprotocol/client"))
);

const client = new Client(
  { name: "tests", version: "1" },
  { versionNegotiation: { mode }, capabilities: { elicitation: { form: {} } } },
);
client.setRequestHandler("elicitation/create", async () => ({ action: "accept", content: { ok: true } }));
if (url.startsWith("{")) {
  const { StdioClientTransport } = await import(pathToFileURL(require.resolve("@modelcontextprotocol/client/stdio")));
  await client.connect(new StdioClientTransport(JSON.parse(url)));
} else {
  await client.connect(new StreamableHTTPClientTransport(new URL(url)));
}

async function done([what, ...given]) {
  switch (what) {
    case "version":
      return client.getNegotiatedProtocolVersion();
    case "capabilities":
      return Object.keys(client.getServerCapabilities()).sort();
    case "tools":
      return (await client.listTools()).tools.map((tool) => tool.name).sort();
    case "prompts":
      return (await client.listPrompts()).prompts.map((prompt) => prompt.name).sort();
    case "resources":
      return (await client.listResources()).resources.map((resource) => resource.uri).sort();
    case "call": {
      const result = await client.callTool({ name: given[0], arguments: given[1] });
      return [result.isError ?? false, result.content[0].text];
    }
    case "prompt":
      return (await client.getPrompt({ name: given[0] })).messages[0].content.text;
    case "read":
      return (await client.readResource({ uri: given[0] })).contents[0].text;
    case "complete": {
      const ref = given[1] === "prompt" ? { type: "ref/prompt", name: given[0] } : { type: "ref/resource", uri: given[0] };
      return (await client.complete({ ref, argument: { name: "repo", value: "a" } })).completion.values;
    }
    default:
      throw new TypeError(what);
  }
}

for (const step of JSON.parse(steps)) {
  let said;
  try {
    said = { result: await done(step) };
  } catch (error) {
    if (error.code === undefined) throw error;
    said = { code: error.code, data: error.data ?? {}, message: error.message };
  }
  console.log(JSON.stringify(said));
}
await client.close();
