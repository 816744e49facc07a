/* The panel of the report page. Nothing is trained again: the student's log-ratios stay those of
   the run. The settings are in the address, #alpha=2&terminal=zero. Data: report.py, panel_data. */
"use strict"
const panel = document.getElementById("panel"), run = JSON.parse(panel.dataset.run)

/* tvkd.shaping, summed over a response: gamma Phi(s_t+1) - Phi(s_t) in all states before s_end */
function sumOfPsi([first, between, last, end], {gamma, terminal}) {
  const phi = {zero: 0, hold: last, value: end}[terminal]
  return gamma * phi - first - (1 - gamma) * between
}

/* Of a margin: the loss -log sigmoid(margin), and the weight of the pair, minus its slope. */
const loss = margin => Math.max(0, -margin) + Math.log1p(Math.exp(-Math.abs(margin)))
const weight = margin => 1 / (1 + Math.exp(margin))

function numbersOf(pair, {alpha, beta, ...rest}) {
  const chosen = sumOfPsi(pair.chosen, rest), rejected = sumOfPsi(pair.rejected, rest)
  const dpo = beta * pair.margin / run.beta, tvkd = dpo - alpha * (chosen - rejected)
  return [tvkd, loss(tvkd), weight(tvkd), dpo, loss(dpo), weight(dpo), chosen, rejected]
}

function tableRow(name, numbers, picked) {
  const cells = numbers.map(x => `<td title="${x}">${x.toFixed(3)}</td>`).join("")
  const bar = (i, name) => `<rect class="${name}" width="${100 * numbers[i]}" height="14"/>`
  return `<tr class="${picked ? "picked" : ""}"><th>${name}</th><td>
    <svg viewBox="0 0 100 14">${bar(2, "tvkd")}${bar(5, "dpo")}</svg></td>${cells}</tr>`
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
    <text class="right" x="280" y="205">${points.length} held-out pairs</text>
    ${points.map(point => circle(point, 'r="3"')).join("")}
    ${circle(ring, 'class="ring" r="6"')}`
}

function draw() {
  const settings = Object.fromEntries(new FormData(panel))
  const {pairs, shown} = run.values[settings.value]
  for (const field of panel.querySelectorAll("input")) {
    settings[field.name] = Number(field.value)
    field.nextElementSibling.value = +settings[field.name].toFixed(3)
  }
  const numbers = pairs.map(pair => numbersOf(pair, settings)), rows = numbers.slice(0, shown)
  const mean = rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / shown)
  const picked = Math.min(settings.pair, shown) - 1, [tvkd,,, dpo,,, w, l] = rows[picked]
  panel.querySelector("tbody").innerHTML = tableRow(`mean of&nbsp;these&nbsp;${shown}`, mean)
    + rows.map((row, i) => tableRow(`pair&nbsp;${i + 1}`, row, i === picked)).join("")
  const f = x => x.toFixed(3), g = x => x < 0 ? `(${f(x)})` : f(x)
  const {alpha, beta} = settings, logratio = pairs[picked].margin / run.beta
  panel.querySelector("#worked").textContent = `Pair ${picked + 1}.`
    + ` DPO's margin: beta × log-ratios = ${f(beta)} × ${g(logratio)} = ${f(dpo)}.`
    + ` TVKD's: ${f(dpo)} - ${f(alpha)} × [${f(w)} - ${g(l)}] = ${f(tvkd)}.`
  const [weights, rewards] = panel.querySelectorAll("figure svg")
  const weighed = numbers.map(n => [alpha * (n[6] - n[7]), n[3], n[2]])
  plot(weights, weighed, weighed[picked], true)
  if (!rewards) return
  const rewarded = numbers.map((n, i) => [n[6] - n[7], pairs[i].reward_gap, .5])
  plot(rewards, rewarded, rewarded[picked], false)
}

/* The address is read on load and when it is edited, and written when a control is let go. */
function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1))
  panel.reset()
  for (const field of panel.querySelectorAll("input, select")) {
    const wanted = asked.get(field.name), number = parseFloat(wanted)
    if (field.name === "terminal") field.value = run.values[panel.elements.value.value].terminal
    if (field.type === "range" ? isFinite(number) : [...field].some(o => o.value === wanted))
      field.value = field.type === "range" ? number : wanted
  }
  draw()
}
panel.oninput = ({target}) => {
  if (target.type === "range") target.value = Number(target.value).toFixed(2)
  if (target.name === "value") panel.elements.terminal.value = run.values[target.value].terminal
  draw()
}
panel.onchange = () => location.replace("#" + new URLSearchParams(new FormData(panel)))
window.onhashchange = readAddress
readAddress()
panel.hidden = false
