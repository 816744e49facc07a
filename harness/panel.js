/* The panel of the report page. The student's log-ratios stay those of the run. The settings are in
   the address, #alpha=2&terminal=zero. Data: report.py, panel_html. */
"use strict"
const panel = document.getElementById("panel"), run = JSON.parse(panel.dataset.run)

/* Of a margin: the loss -log sigmoid(margin), and the weight of the pair, minus its slope. */
const loss = margin => Math.max(0, -margin) + Math.log1p(Math.exp(-Math.abs(margin)))
const weight = margin => 1 / (1 + Math.exp(margin))

/* tvkd.shaping, summed over a response: gamma Phi(s_t+1) - Phi(s_t) in all states before s_end */
function sumOfPsi([first, between, last, end], gamma, terminal) {
  return gamma * {zero: 0, hold: last, value: end}[terminal] - first - (1 - gamma) * between
}

function numbersOf(pair, {alpha, beta, gamma, terminal}) {
  const [chosen, rejected] = [pair.chosen, pair.rejected].map(V => sumOfPsi(V, gamma, terminal))
  const dpo = beta * pair.margin / run.beta, tvkd = dpo - alpha * (chosen - rejected)
  return [tvkd, loss(tvkd), weight(tvkd), dpo, loss(dpo), weight(dpo), chosen, rejected]
}

/* points: [x, y, shade]; ring: one of them. The axes reach to a power of two: mostly they stay. */
function plot(svg, points, ring, sameScale) {
  const reach = i => 2 ** Math.ceil(Math.log2(Math.max(1, ...points.map(p => Math.abs(p[i])))))
  const X = sameScale ? Math.max(reach(0), reach(1)) : reach(0), Y = sameScale ? X : reach(1)
  const circle = ([x, y, shade], rest) => `<circle cx="${(150 + 130 * x / X).toFixed(2)}"
    cy="${(110 - 95 * y / Y).toFixed(2)}" fill-opacity="${shade.toFixed(3)}" ${rest}/>`
  svg.innerHTML = `<path class="grid" d="M20 110H280M150 15V205"/>
    <path class="zero" d="${sameScale ? "M20 205L280 15" : ""}"/>
    <text x="20" y="122">${-X}</text><text class="right" x="280" y="122">${X}</text>
    <text x="154" y="22">${Y}</text><text x="154" y="205">${-Y}</text>
    ${points.map(point => circle(point, 'r="3"')).join("")}${circle(ring, 'class="ring" r="6"')}`
}

function draw() {
  const settings = Object.fromEntries(new FormData(panel))
  const {pairs, terminal} = run.values[settings.value]
  if (settings.terminal === "as trained") settings.terminal = terminal
  for (const field of panel.querySelectorAll("input")) {
    settings[field.name] = Number(field.value)
    field.nextElementSibling.value = +settings[field.name].toFixed(3)
  }
  const {alpha, beta, pair} = settings, numbers = pairs.map(pair => numbersOf(pair, settings))
  const mean = numbers[0].map((_, i) => numbers.reduce((sum, n) => sum + n[i], 0) / pairs.length)
  const rows = [[`mean&nbsp;of&nbsp;${pairs.length}`, mean]]
  for (let i = 0; i < panel.elements.pair.length; i++) rows.push([`pair&nbsp;${i + 1}`, numbers[i]])
  panel.querySelector("tbody").innerHTML = rows.map(([name, row]) => `<tr><th>${name}</th>
    ${row.map(x => `<td title="${x}">${x.toFixed(3)}</td>`).join("")}</tr>`).join("")
  const [tvkd,,, dpo,,, w, l] = numbers[pair - 1], logratio = pairs[pair - 1].margin / run.beta
  const f = x => x.toFixed(3), g = x => x < 0 ? `(${f(x)})` : f(x)
  panel.querySelector("#worked").textContent = `Pair ${pair}. DPO's margin: beta ×`
    + ` log-ratios = ${f(beta)} × ${g(logratio)} = ${f(dpo)}.`
    + ` TVKD's: ${f(dpo)} - ${f(alpha)} × [${f(w)} - ${g(l)}] = ${f(tvkd)}.`
  const [weights, rewards] = panel.querySelectorAll("figure svg")
  const weighed = numbers.map(n => [alpha * (n[6] - n[7]), n[3], n[2]])
  plot(weights, weighed, weighed[pair - 1], true)
  const rewarded = numbers.map((n, i) => [n[6] - n[7], pairs[i].gap, .5])
  if (rewards) plot(rewards, rewarded, rewarded[pair - 1], false)
}

/* The address is read on load and when it is edited, and written when a control is let go. */
window.onhashchange = () => {
  panel.reset()
  for (const [name, wanted] of new URLSearchParams(location.hash.slice(1))) {
    const field = panel.elements.namedItem(name)
    const options = field?.options && [...field.options].map(option => option.value)
    if (options ? options.includes(wanted) : field && parseFloat(wanted) == wanted)
      field.value = wanted
  }
  draw()
}
panel.onchange = () => location.replace("#" + new URLSearchParams(new FormData(panel)))
panel.oninput = ({target}) => {
  if (target.type === "range") target.value = Number(target.value).toFixed(2)
  draw()
}
window.onhashchange()
panel.hidden = false
