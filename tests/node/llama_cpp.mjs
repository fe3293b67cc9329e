// What llama.cpp makes of a GGUF file: the tokens of texts, and a greedy answer, perhaps with an adapter.
// node llama_cpp.mjs MODEL REQUEST.json [ADAPTER]; the last line of stdout is JSON.
import { readFileSync } from "node:fs";
import { getLlama } from "node-llama-cpp";

const [modelPath, requestPath, adapterPath] = process.argv.slice(2);
const { texts, prompt, count } = JSON.parse(readFileSync(requestPath, "utf-8"));
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const model = await llama.loadModel({ modelPath, gpuLayers: 0 });
const lora = adapterPath ? { adapters: [{ filePath: adapterPath }] } : undefined;
const context = await model.createContext({ contextSize: 256, threads: 1, lora });
const answer = [];
for await (const token of context.getSequence().evaluate(prompt, { temperature: 0 })) {
  answer.push(token);
  if (answer.length >= count) break;
}
console.log(JSON.stringify({ tokens: texts.map((text) => Array.from(model.tokenize(text, true))), answer }));
process.exit(0); // the binding keeps threads
