// Run by node where transformers.js is: reads a folder of a3 export onnx.
// node in_transformers_js.mjs MODULES FOLDER asked.json answers.json logits.bin
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, folder, askedPath, answersPath, logitsPath] = process.argv.slice(2);
const require = createRequire(join(resolve(modules), "x.js"));
const home = dirname(dirname(require.resolve("@huggingface/transformers")));
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = await import(
  pathToFileURL(join(home, "dist/transformers.node.mjs"))
);
const { version } = JSON.parse(readFileSync(join(home, "package.json")));
const asked = JSON.parse(readFileSync(askedPath));
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));

const name = basename(resolve(folder));
const options = { session_options: { intraOpNumThreads: 2, logSeverityLevel: 3 } };
const model = await AutoModelForCausalLM.from_pretrained(name, options);
const tokenizer = await AutoTokenizer.from_pretrained(name);

const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const ones = (count) => row(Array(count).fill(1));

async function read(ids, seen, past) {
  const inputs = { input_ids: row(ids), attention_mask: ones(seen + ids.length) };
  return model.forward(past ? { ...inputs, past_key_values: past } : inputs);
}

function cache(out) {
  const past = {};
  for (const [key, value] of Object.entries(out))
    if (key.startsWith("present.")) past[key.replace("present", "past_key_values")] = value;
  return past;
}

const { tokens } = asked;
await read(tokens.slice(0, 8), 0);
let start = performance.now();
const whole = await read(tokens, 0);
const readSeconds = (performance.now() - start) / 1000;
writeFileSync(logitsPath, whole.logits.data);
const held = Object.values(cache(whole)).reduce((sum, x) => sum + x.data.byteLength, 0);
const half = tokens.length >> 1;
const first = await read(tokens.slice(0, half), 0);
const second = await read(tokens.slice(half), half, cache(first));
let inTwo = 0;
const width = whole.logits.dims[2];
for (const [from, part] of [[0, first], [half, second]])
  part.logits.data.forEach((x, i) => {
    inTwo = Math.max(inTwo, Math.abs(x - whole.logits.data[from * width + i]));
  });

// Text is made by its own loop.
start = performance.now();
const made = await model.generate({
  input_ids: row(tokens.slice(0, asked.prompt)),
  attention_mask: ones(asked.prompt),
  max_new_tokens: asked.greedy,
  min_new_tokens: asked.greedy,
  do_sample: false,
});
const seconds = (performance.now() - start) / 1000;
writeFileSync(
  answersPath,
  JSON.stringify({
    version: `transformers.js ${version}`,
    shape: whole.logits.dims,
    in_two: inTwo,
    held,
    greedy: Array.from(made.data.slice(asked.prompt), Number),
    speeds: [tokens.length / readSeconds, asked.greedy / seconds],
    ids: asked.texts.map((text) => tokenizer.encode(text)),
  }),
);
